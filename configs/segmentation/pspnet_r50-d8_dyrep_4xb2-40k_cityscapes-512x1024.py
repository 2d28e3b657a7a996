# PSPNet R50-D8, 512x1024, 40k iterations, on Cityscapes (Table 5), DyRep in stage D: training
# starts from a plain ResNet-50 and its backbone grows from there.
_base_ = './pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'

# The paper gives no interval for a loop of iterations: this one makes 11 updates, as many as the
# 12 epochs of its detector do.
default_hooks = dict(dyrep=dict(type='dyrep_mm.DyRepHook', preset='paper', interval=3500))
