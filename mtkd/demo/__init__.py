"""The demonstration: eleven teachers of handwritten digits, one small student, three losses.

`python -m mtkd.demo` fits the teachers, distils them into the student with the Gaussian
likelihood, the squared error and the cosine, and compares all of them on held-out images.
"""
