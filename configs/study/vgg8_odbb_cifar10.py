_base_ = ['./vgg8_cifar10.py', '../_base_/methods/odbb.py']

# The parts that the phases have in the public code.
default_hooks = dict(
    dyrep=dict(
        _base_.pop('dyrep'), warmup=max(1, _base_.epochs // 10), fixed=_base_.epochs * 2 // 3
    )
)
