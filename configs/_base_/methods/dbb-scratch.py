# DBB with its own 4 operations (Table 1), started as its authors do: branches are added to what a
# conv computes, each as large as the conv, instead of being taken out of its kernel. dyrep.py
# beside this file says how a config takes it.
dyrep = dict(
    type='dyrep_mm.DyRepHook',
    interval=None,
    structure='dbb',
    init_scale=1.0,
    compensate=False,
)
