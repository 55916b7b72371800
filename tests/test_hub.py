"""The loopback Hub of the tests does what the real one does, where the tests rely on it."""

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

import tiny


# huggingface_hub uploads LFS files in a way that its HTTP client wants spelled otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def test_a_model_comes_back_as_it_was_pushed(hub):
    """Regular and LFS files, and nothing that the server does not know."""
    model = tiny.llama(0)
    model.push_to_hub("tester/tiny")
    assert set(hub.blobs.values()) == {hub.repos["tester/tiny"].files["model.safetensors"]}
    back = type(model).from_pretrained("tester/tiny")
    for name, weights in model.state_dict().items():
        assert weights.equal(back.state_dict()[name])
    assert not hub.unknown


def test_revisions_private_repositories_and_the_cache(hub, monkeypatch):
    api = HfApi()
    api.create_repo("tester/notes", private=True)
    first, second = (
        api.upload_file(repo_id="tester/notes", path_or_fileobj=text, path_in_repo="a.txt").oid
        for text in (b"1", b"2")
    )
    for revision, text in ((first, "1"), (second, "2"), (None, "2")):
        with open(hf_hub_download("tester/notes", "a.txt", revision=revision)) as file:
            assert file.read() == text
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("tester/notes", "a.txt", revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/notes", token=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert hf_hub_download("tester/notes", "a.txt").endswith(f"{second}/a.txt")
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("tester/notes", "b.txt")
    assert len(hub.requests) == asked


def test_a_cut_connection_is_seen_by_the_client(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    content = bytes(range(256)) * 4096
    HfApi().create_repo("tester/large")
    hub.drop("PUT ")
    HfApi().upload_file(repo_id="tester/large", path_or_fileobj=content, path_in_repo="a.safetensors")
    hub.drop("GET .*a.safetensors")
    folder = snapshot_download("tester/large")
    with open(f"{folder}/a.safetensors", "rb") as file:
        assert file.read() == content
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    assert sum(request.startswith("GET") and "a.safetensors" in request for request in hub.requests) == 2
