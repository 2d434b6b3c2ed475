class MindSpeedFeature:
    def __init__(self, feature_name, optimization_level=2):
        self.feature_name = feature_name

    def register_args(self, parser):
        pass

    def validate_args(self, args):
        pass

    def register_patches(self, patch_manager, args):
        pass

    @staticmethod
    def add_parser_argument_choices_value(parser, argument_name, new_choice):
        for action in parser._actions:
            if argument_name in action.option_strings and new_choice not in action.choices:
                action.choices.append(new_choice)
