"""What every test shares."""

import gc
import os


# The Hugging Face libraries read these once, when they are imported: set them before anything else.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, so each of them gets one
    os.environ.setdefault("OMP_NUM_THREADS", "1")


import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage():
    """Trainers collect garbage at each `train()`, half a second among all that the libraries have imported: leave that out."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, with which the Hugging Face libraries talk, and an empty cache; see tests/hub.py."""
    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    from hub import TOKEN, Hub

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()
