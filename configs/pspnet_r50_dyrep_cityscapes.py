# PSPNet R50-D8, 512x1024, 40k iterations, on Cityscapes (Table 5), DyRep in stage D.
_base_ = './segmentation/pspnet_r50-d8_dyrep_4xb2-40k_cityscapes-512x1024.py'
