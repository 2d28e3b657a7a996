# DyRep with the numbers of the paper: README.md of the project says what the word stands for. A
# config adds when growing ends, which the paper does not say and the authors' strategy files do.
#
# mmengine lets no two bases define one key, and every model config has `default_hooks` already. So
# a method is a variable here, and a config moves it into place:
#
#     _base_ = ['./MODEL.py', '../_base_/methods/dyrep.py']
#     default_hooks = dict(dyrep=_base_.pop('dyrep'))
dyrep = dict(
    type='dyrep_mm.DyRepHook',
    preset='paper',
    interval=5,  # t, epochs (section 5.1)
)
