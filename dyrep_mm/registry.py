"""Child registries of mmengine's: ``type='dyrep_mm.DyRepHook'`` imports and finds us."""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='dyrep_mm',
    locations=['dyrep_mm.engine.hook', 'dyrep_mm.engine.repnas'],
)
TASK_UTILS = Registry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='dyrep_mm',
    locations=['dyrep_mm.engine.converter'],
)
MODELS = Registry(
    'model', parent=MMENGINE_MODELS, scope='dyrep_mm', locations=['dyrep_mm.backbones']
)
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=MMENGINE_WEIGHT_INITIALIZERS,
    scope='dyrep_mm',
    locations=['dyrep_mm.engine.pretrained'],
)
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='dyrep_mm', locations=['dyrep_mm.datasets']
)
FUNCTIONS = Registry(
    'function', parent=MMENGINE_FUNCTIONS, scope='dyrep_mm', locations=['dyrep_mm.datasets']
)
