"""Walks over the headers of image files, within a budget, before Pillow reads them.

Pillow and the libraries below it believe what a header says, and some take quadratic time for a header of many small parts. So
each format has a ``walk`` here that goes over what Pillow would read before the pixels, counts it with ``steps``, and stops at
the first part that no image needs. It also says how often decoding goes over the pixels, where the header tells.
"""
