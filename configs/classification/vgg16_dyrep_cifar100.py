_base_ = './vgg16_cifar100.py'

custom_hooks = [dict(type='dyrep_mm.DyRepHook', interval=15)]  # t (section 5.1)
