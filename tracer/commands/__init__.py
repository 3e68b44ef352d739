"""Console commands of the tracer; each module adds its own to the app by `register`."""
