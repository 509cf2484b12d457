"""``python -m benchmarks.fidelity``: what each encoding keeps of the teacher: bytes, distances, gradients, students."""
