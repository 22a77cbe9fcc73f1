from tests.engine.conftest import make_model, model_dir

__all__ = ["make_model", "model_dir"]
