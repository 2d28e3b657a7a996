# DyRep with the numbers of the paper; each is also the hook's default.
#
# mmengine lets no two bases define one key, and every model config has `default_hooks` already. So
# a method is a variable here, and a config moves it into place:
#
#     _base_ = ['./MODEL.py', '../_base_/methods/dyrep.py']
#     default_hooks = dict(dyrep=_base_.pop('dyrep'))
dyrep = dict(
    type='dyrep_mm.DyRepHook',
    interval=5,  # t, epochs (section 5.1)
    metric='synflow',  # Eq. 4 (section 4.1)
    grow_per_update=1,  # the argmax (Algorithm 1)
    branches=['kxk', '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity'],  # Table 1
    init_scale=0.01,  # gamma of a new branch (section 4.1)
    calibration_batches=20,  # for the statistics of new norms (section 4.1)
    prune=True,  # de-parameterization (section 4.2)
    prune_threshold=0.02,  # lambda (section 4.2)
)
