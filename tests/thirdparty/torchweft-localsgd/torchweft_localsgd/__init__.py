"""Local SGD as a strategy of torchweft."""
