"""The loop for GPUs without a kernel of their own: the plain one, several steps a turn."""

import functools

from slif.loops import plain

# XLA launches 3 kernels a turn forwards and 9 in training; eight steps a turn take 3 and 11. Sixteen gain little more,
# and 32 compile three times longer.
run = functools.partial(plain.run, unroll=8)
