_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar10.py'

# Figure 4: importance of a new branch (section 5.5).
default_hooks = dict(dyrep=dict(init_scale=0.001))
