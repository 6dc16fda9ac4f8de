"""The host's settings page: what is set there does what it says on the server."""

import json
import urllib.request

import pytest
from test_hostile import small

from liveavatar_core.client.connection import WorkflowFailed


@pytest.fixture
def change(server):
    """change("LiveAvatar.Devices", "cpu"), for the length of a test."""
    changed = set()

    def post(name: str, value: object) -> None:
        body = json.dumps(value).encode()
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/settings/{name}", body)).close()

    yield lambda name, value: changed.add(name) or post(name, value)
    for name in changed:
        post(name, None)


def test_auto_means_the_devices_that_were_set(change, run_workflow) -> None:
    """And what is no setting of its kind is as good as none."""
    change("LiveAvatar.Devices", ["cpu"])
    change("LiveAvatar.CacheGiB", "much")
    change("LiveAvatar.PreviewPictures", {"large": True})
    run_workflow(small(Sampler__seed=8100))
    change("LiveAvatar.Devices", "moon:0")
    with pytest.raises(WorkflowFailed, match="'moon:0' is not a name torch knows; use names like"):
        run_workflow(small(Sampler__seed=8100))


def test_latents_are_kept_as_far_as_was_set(server, change, run_workflow) -> None:
    change("LiveAvatar.CacheGiB", 0)
    for seed in (8101, 8102):
        run_workflow(small(Sampler__seed=seed))
    assert len(list((server.base / "temp" / "liveavatar").glob("*.latents"))) == 1
