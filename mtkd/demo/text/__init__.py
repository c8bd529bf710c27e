"""The demonstration on text: a pretrained transformer and five fitted teachers, one small student.

`python -m mtkd.demo text` fills a teacher store, distils a small transformer from it with three
losses, stops and resumes, compares the losses by light probes, exports a student and loads it.
"""
