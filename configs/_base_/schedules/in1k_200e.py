# The recipe of the larger VGG-style models (section 5.1): 200 epochs; label smoothing is in their
# heads. Batch 256 and cosine from 0.1 as RepVGG, which it follows.
_base_ = './in1k_120e.py'

param_scheduler = dict(T_max=200, end=200)
train_cfg = dict(max_epochs=200)
