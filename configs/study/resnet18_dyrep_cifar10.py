_base_ = './resnet18_cifar10.py'

default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', interval=1, metric='gain'))
