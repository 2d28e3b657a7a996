# DyRep in stage C: the classifier trained with DyRep starts the plain segmentor, by its fused
# weights, which are those that every checkpoint has in the place of stock ones.

# -- Set this ------------------------------------------------------------------------------------
# The last checkpoint of study/resnet18_dyrep_cifar10.py; STAGE_C is the folder of its study.
checkpoint = '{{$STAGE_C:work_dirs/stage-c}}/resnet18_dyrep_cifar10/seed-0/epoch_3.pth'
# ------------------------------------------------------------------------------------------------

_base_ = './pspnet-r18_camvid.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint=checkpoint)))
