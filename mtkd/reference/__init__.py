"""Every loss and its gradient as plain PyTorch formulas: the theory of the library.

A formula takes its operator's arguments in canonical shape (leading dimensions flattened to
``N`` rows, a mode dimension always present) and returns the matrix of losses ``(N, T)``; a
gradient formula takes the gradient of that matrix first. They are the fallback on every device,
what tracing sees, what second derivatives are taken of, and what every kernel is tested against.
"""
