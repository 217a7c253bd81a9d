"Two busy cores make any deadline a coin toss: hypothesis examples may take their time."
from hypothesis import settings

settings.register_profile('cmvc', deadline=None, print_blob=True)
settings.load_profile('cmvc')
