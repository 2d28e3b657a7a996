# The recipe of MobileNet (section 5.1): 90 epochs and weight decay 4e-5; the rest is as for
# ResNet.
_base_ = './in1k_120e.py'

optim_wrapper = dict(optimizer=dict(weight_decay=4e-5))
param_scheduler = dict(T_max=90, end=90)
train_cfg = dict(max_epochs=90)
