"""Programs that measure, prove and draw; the tests import some of them."""
