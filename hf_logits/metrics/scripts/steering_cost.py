from hf_logits.metrics.steering_cost import SteeringCost  # noqa: F401
