# The plain row of Table 5: the config of the library as it is. `mmseg::` as a base looks for a
# distribution of the name mmsegmentation, the path for the package that is installed.
_base_ = (
    __import__('mmseg').__path__[0]
    + '/.mim/configs/pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
)
