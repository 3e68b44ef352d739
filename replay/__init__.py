"""Replay on a real GPU: not built yet. It will drive the same decision core as the simulator."""
