"""Running a model: the public class, generation, sampling."""
