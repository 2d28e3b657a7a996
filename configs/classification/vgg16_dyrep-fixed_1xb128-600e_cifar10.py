# A structure that DyRep has found, trained from scratch without adaptation (section 5.5, Table 7).

# -- Set this ------------------------------------------------------------------------------------
# A structure file (JSON), or the checkpoint of any epoch of the run that found the structure.
structure = 'work_dirs/vgg16_dyrep_1xb128-600e_cifar10/epoch_400.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './vgg16_dyrep_1xb128-600e_cifar10.py'

default_hooks = dict(dyrep=dict(interval=None, structure=structure, init_scale=1.0))
