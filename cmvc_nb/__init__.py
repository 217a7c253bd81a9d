__version__ = "0.1.0"

def __getattr__(name):
    "`cmvc_nb.Codec`, imported when it is asked for: importing the package itself stays light."
    if name == 'Codec':
        from .codec import Codec
        return Codec
    raise AttributeError(f"module 'cmvc_nb' has no attribute '{name}'")
