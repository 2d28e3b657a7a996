# DyRep with the defaults of the hook and the score `gain`; the other rows of DyRep change one
# option of this one.
_base_ = './vgg8_cifar10.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=1,
        # Growing ends at 5/6 of the training, as in the authors' strategy files.
        end=_base_.epochs * 5 // 6,
        metric='gain',
    )
)
