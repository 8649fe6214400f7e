"""An image file becomes pixels at the teacher's size, in worker processes and shared memory."""
