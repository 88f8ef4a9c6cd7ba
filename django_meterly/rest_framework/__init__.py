"""Django REST framework: errors, a permission, and balances for front ends."""
