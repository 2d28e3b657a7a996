_base_ = ['./resnet18_cifar10.py', '../_base_/methods/dyrep.py']

default_hooks = dict(
    dyrep=dict(_base_.pop('dyrep'), interval=1, metric='gain', branch_norm='fixed')
)
