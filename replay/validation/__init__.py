"""Predicted against measured, point by point.

=============  =================================================================
module         holds
=============  =================================================================
plan           what is validated, from a YAML file
machine        this machine's times: the model's, and each policy's host time
run            predictions first, then measurements, interleaved, canaries around
errors         gaps, noise, ranking
report         the report's files
figure         predicted against measured, as a picture
=============  =================================================================
"""
