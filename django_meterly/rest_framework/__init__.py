"""Django REST framework: errors, a permission, and balances for front ends.

``exceptions``
    The guard's refusals as DRF's exceptions. ``refuse`` raises them for guarded views,
    for ``HasCredits`` and for the balance views.
``permissions``
    ``HasCredits`` refuses early, by a balance.
``urls``, ``views``, ``balances``
    The caller's own balances, as JSON.
"""
