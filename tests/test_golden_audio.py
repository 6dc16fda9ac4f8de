"""From 50 Hz hidden states to the features of every video frame, against the recording."""

import torch

from liveavatar_core.encoders.audio_features import bucket, clip_count, frame_index, to_feature_rate
from liveavatar_core.geometry import FRAMES_PER_CLIP

FEATURES = 5e-5  # float32 positions differ by 1.4e-5 from exact ones


def test_30hz(golden, agree):
    tensors, _ = golden("audio_encoder")
    agree("audio_encoder", "feat_30hz", to_feature_rate(tensors["feat_50hz"]), tensors["feat_30hz"], FEATURES)


def test_lengths(golden, agree):
    tensors, _ = golden("audio_encoder")
    names = [name for name in tensors if name.startswith("interp_len_")]
    assert names
    for name in names:
        hidden = tensors["feat_50hz"][:1, : int(name.removeprefix("interp_len_"))]
        agree("audio_encoder", name, to_feature_rate(hidden), tensors[name], FEATURES)


def test_clips(golden, agree):
    tensors, manifest = golden("audio_encoder")
    features = bucket(to_feature_rate(tensors["feat_50hz"]), manifest["fps"])
    agree("audio_encoder", "bucketed", features, tensors["bucketed"], FEATURES)
    clips = features.split(FRAMES_PER_CLIP, -1)
    assert len(clips) == manifest["num_clips"]
    for i, clip in enumerate(clips):
        agree("audio_encoder", f"clip_{i}", clip, tensors[f"clip_{i}"], FEATURES)


def test_indices(golden, agree):
    tensors, manifest = golden("audio_encoder")
    names = [name for name in tensors if name.startswith("index_T")]
    assert names
    for name in names:
        length = int(name.removeprefix("index_T"))
        frames = clip_count(length, manifest["fps"]) * FRAMES_PER_CLIP
        index = frame_index(range(frames), length, manifest["fps"])
        assert index.dtype == torch.int64
        agree("audio_encoder", name, index, tensors[name], 0)
