# Plain, with twice the epochs: what the time that branches cost would buy without them.
_base_ = './vgg8_cifar10.py'

train_cfg = dict(max_epochs=_base_.epochs * 2)
