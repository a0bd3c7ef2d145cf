"""Training data: files, their rows, and the batches of a step.

reading  dataset, row_reader, read_ahead, tensor_file (writes), memory, toy
a step   batches, source (of its paths), augmentation, randomness

What is known of data without torch, as `submit` must: runs/datasets.py, runs/data_file.py.
"""
