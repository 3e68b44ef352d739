"""Measure what a GPU, its link and its host can do, and write it as a hardware profile.

=========  ==============================================================
rig        what a machine under test can be told to do; sizes and repeats
cuda       the rig on a CUDA GPU
stats      from repeats to a value and its spread
link       copies by size, back to back, beside a busy GPU; the fit
compute    memory bandwidth, matrix products, slow-down beside copies
host       launches, hand-overs, readback, pinning, decisions
cpu        experts on the CPU, alone and beside copies
predictor  time until a prediction is there
program    all of it, in order
profile    from readings to a hardware file
figure     the link's curve and the values
=========  ==============================================================

`profile` and `stats` need no torch; nothing here is imported before a command asks for it.
"""
