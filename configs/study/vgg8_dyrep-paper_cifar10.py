_base_ = ['./vgg8_cifar10.py', '../_base_/methods/dyrep.py']

# Growing ends at 5/6 of the training, as in the authors' strategy files.
default_hooks = dict(
    dyrep=dict(
        _base_.pop('dyrep'),
        interval=1,
        end=_base_.epochs * 5 // 6,
    )
)
