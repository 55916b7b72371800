from hf_logits.metrics.calibration_error import CalibrationError  # noqa: F401
