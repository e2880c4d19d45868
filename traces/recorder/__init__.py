"""The recorder: what the routers of a real PyTorch model decide, while it generates."""

from moesim.traces.recorder.hooks import Recorder, record

__all__ = ["Recorder", "record"]
