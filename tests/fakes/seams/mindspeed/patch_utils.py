import importlib


class MindSpeedPatchesManager:
    patches = {}

    @staticmethod
    def register_patch(orig_func_name, new_func=None, force_patch=False, create_dummy=False):
        assert new_func.__name__.endswith(("wrapper", "decorator")), "anything else replaces the function"
        MindSpeedPatchesManager.patches.setdefault(orig_func_name, []).append(new_func)

    @staticmethod
    def apply_patches():
        for path, wrappers in MindSpeedPatchesManager.patches.items():
            module, name = path.rsplit(".", 1)
            module = importlib.import_module(module)
            for wrapper in wrappers:
                setattr(module, name, wrapper(getattr(module, name)))
