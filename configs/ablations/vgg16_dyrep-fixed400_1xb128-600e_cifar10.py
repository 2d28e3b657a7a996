# Table 7: the structure that DyRep had at epoch 400, trained from scratch without
# adaptation (section 5.5).

# -- Set this ------------------------------------------------------------------------------------
# A structure file (JSON), or the checkpoint of that epoch of the run that found the structure.
structure = 'work_dirs/vgg16_dyrep_1xb128-600e_cifar10/epoch_400.pth'
# ------------------------------------------------------------------------------------------------

_base_ = '../classification/vgg16_dyrep_1xb128-600e_cifar10.py'

default_hooks = dict(dyrep=dict(interval=None, structure=structure, init_scale=1.0))
