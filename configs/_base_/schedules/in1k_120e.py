# The recipe of Table 3 and of RepVGG-A2 (section 5.1): 120 epochs, batch 256, SGD with momentum 0.9
# and weight decay 1e-4, cosine learning rate from 0.1. From the authors' files: Nesterov momentum,
# no decay of norms and biases, and a rate that falls in every iteration, to 1e-7. "The same
# strategies as DBB" (section 5.1) these are not: DBB's own has neither Nesterov nor that, and a
# double rate for biases.
_base_ = [
    'mmpretrain::_base_/schedules/imagenet_bs256_coslr.py',
    'mmpretrain::_base_/default_runtime.py',
]

optim_wrapper = dict(
    optimizer=dict(nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
)
param_scheduler = dict(T_max=120, end=120, eta_min=1e-7, convert_to_iter_based=True)
train_cfg = dict(max_epochs=120)
