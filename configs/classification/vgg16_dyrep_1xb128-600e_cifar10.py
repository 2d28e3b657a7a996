_base_ = ['./vgg16_1xb128-600e_cifar10.py', '../_base_/methods/dyrep.py']

# t (section 5.1); the last epoch that may grow, from the authors' files.
default_hooks = dict(dyrep=dict(_base_.pop('dyrep'), interval=15, end=500))
