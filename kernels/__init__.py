"""Triton kernels, one file an op, installed as ``genperf.kernels``.

Files whose name begins with an underscore hold what the ops share. Each other file offers functions
with the signature of its torch op, and ``AOT``: the kernels' representative specialisations, which
``tests/test_aot.py`` compiles ahead of time. In the kernels ``p_`` is a pointer, ``b_`` a block's
values, ``i_`` an index, ``m_`` a mask and ``s_`` a tuple of strides.
"""
