"""A scheme for each layer under limits of bytes and time, judged by whole runs of the pipeline."""
