# DyRep with the numbers of the paper; each is also the hook's default.
custom_hooks = [
    dict(
        type='dyrep_mm.DyRepHook',
        interval=5,  # t, epochs (section 5.1)
        metric='synflow',  # Eq. 4 (section 4.1)
        grow_per_update=1,  # the argmax (Algorithm 1)
        branches=['kxk', '1x1', '1x1-kxk', '1x1-avg', '1xk', 'kx1', 'identity'],  # Table 1
        init_scale=0.01,  # gamma of a new branch (section 4.1)
        calibration_batches=20,  # for the statistics of new norms (section 4.1)
        prune=True,  # de-parameterization (section 4.2)
        prune_threshold=0.02,  # lambda (section 4.2)
    ),
]
