"""One prompt about every image of a folder, on all CPUs or GPUs of a machine; it resumes."""
